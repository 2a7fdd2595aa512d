"""What several test files share: tiny models, data folders, encoders without weights, a Hub, a driver of kills."""
