"""Training of the `bi` experts (`training.contrastive`) and of the token routers (`training.router`)."""
