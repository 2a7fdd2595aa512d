"""Publishing and loading with the real client libraries, against a strict Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loopback_hub import CHUNK, MULTIPART_ABOVE, TOKEN, Commit, File, LoopbackHub, git_sha1
from helpers.models import TEXTS, make_checkpoint
from huggingface_hub import HfApi, constants
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ubmoe_st import UBMoE
from ubmoe_st.bases import resolve_base
from ubmoe_st.checkpoint import CheckpointError, verify_sums
from ubmoe_st.cli import app
from ubmoe_st.files import sha256_of
from ubmoe_st.hub import download, push

REPO = "org/ubmoe-tiny"


@pytest.fixture
def strict():
    """A running Hub; what the client should not have sent fails the test."""
    with LoopbackHub() as running:
        yield running
    assert running.problems == []


@pytest.fixture
def hub(strict, client, monkeypatch):
    client(strict.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return strict


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Point the client of this process, which has read its environment already, to an endpoint."""

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        # The Hub's chunk store is a protocol of its own; large files go by LFS here.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between attempts

    return point


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    hidden = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**hidden, **own, **more}


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def digests(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {path: digest for digest, _, path in (line.partition("  ") for line in lines)}


def titles(hub: LoopbackHub, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.repositories[REPO].history(revision)]


def test_the_reference_is_strict():
    def send(hub: LoopbackHub, method: str, path: str, body: bytes = b"", token: str | None = TOKEN) -> int:
        request = urllib.request.Request(hub.url + path, data=body or None, method=method)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    create = json.dumps({"name": "x", "organization": "org"}).encode()
    sent = hashlib.sha256(b"other").hexdigest()
    with LoopbackHub() as hub:
        assert send(hub, "POST", "/api/repos/create", create, token=None) == 401
        assert len(hub.problems) == 1
        assert send(hub, "POST", "/api/repos/create", create) == 200
        assert send(hub, "GET", "/api/models/org/x/unheard-of") == 501
        assert send(hub, "PUT", f"/lfs/{sent}", b"content") == 400
        hub.expected_sizes[sent] = 7
        assert send(hub, "PUT", f"/lfs/{sent}", b"content") == 400
        line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": sent, "size": 7}}
        header = {"key": "header", "value": {"summary": "one"}}
        body = "\n".join(map(json.dumps, (header, line))).encode()
        assert send(hub, "POST", "/api/models/org/x/commit/main", body) == 400
        assert len(hub.problems) == 5
        assert hub.objects == {}
        assert len(hub.repositories["org/x"].history()) == 1


def test_everything_in_one_commit(hub, checkpoint):
    commit = push(checkpoint, REPO, commit_message="the first")
    assert titles(hub) == ["the first", "initial commit"]
    assert commit.commit_url.startswith(f"{hub.url}/{REPO}/commit/")
    assert not hub.repositories[REPO].private
    local = digests(checkpoint)
    shared = "generator/model-shared.safetensors"
    assert hub.files(REPO) == {*local, shared, "SHA256SUMS", ".gitattributes"}
    published = {path: hashlib.sha256(hub.content(REPO, path)).hexdigest() for path in hub.files(REPO)}
    differing = {path for path in local if published[path] != local[path]}
    assert differing == {"README.md", "generator/model.safetensors.index.json"}
    listed = dict(reversed(line.split("  ")) for line in hub.content(REPO, "SHA256SUMS").decode().splitlines())
    assert listed == {path: sum_ for path, sum_ in published.items() if path not in ("SHA256SUMS", ".gitattributes")}
    assert published[shared] == local["model-shared.safetensors"]
    card = hub.content(REPO, "README.md").decode()
    for call in (f'SentenceTransformer("{REPO}")', f'UBMoE("{REPO}")', f'from_pretrained("{REPO}", subfolder='):
        assert call in card
    assert '"ubmoe-tiny"' not in card
    large = {path: (checkpoint / path).stat().st_size for path in local if path.endswith(".safetensors")}
    assert max(large.values()) > 2 * MULTIPART_ABOVE > 2 * CHUNK
    assert min(large.values()) < MULTIPART_ABOVE
    assert hub.received == sum(large.values())  # the shared tensors, under two names, once


def test_private_branch_and_pull_request(hub, client, checkpoint, monkeypatch):
    private = json.loads(run("push", checkpoint, REPO, "--private", "--revision", "next", "--json").stdout)
    assert private["repo"] == REPO
    assert hub.repositories[REPO].private
    assert titles(hub) == ["initial commit"]
    assert titles(hub, "next") == ["Upload ubmoe-tiny", "initial commit"]
    answer = run("push", checkpoint, REPO, "--create-pr", "-m", "a request")
    assert f"{hub.url}/{REPO}/discussions/1" in answer.stdout
    assert titles(hub) == ["initial commit"]
    assert titles(hub, "refs/pr/1") == ["a request", "initial commit"]
    assert hub.files(REPO, "next") == hub.files(REPO, "refs/pr/1")
    found = download(REPO, wanted="", revision="next")
    assert (found / "model-bi.safetensors").is_file()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="private"):
        download(REPO, wanted="", revision="refs/pr/1")


def test_a_repository_with_files_is_not_changed_unasked(hub, checkpoint, base, tmp_path):
    push(checkpoint, REPO)
    with pytest.raises(FileExistsError, match="exist_ok=True"):
        push(checkpoint, REPO)
    with pytest.raises(ValueError, match="public"):
        push(checkpoint, REPO, private=True, exist_ok=True)
    refused = run("push", checkpoint, REPO, code=1).stderr
    assert "with --exist-ok, or open a pull request with --create-pr" in refused
    push(checkpoint, REPO, exist_ok=True)
    assert len(titles(hub)) == 2, "an unchanged checkpoint makes no commit"

    extra = tmp_path / "extra"
    shutil.copytree(checkpoint, extra)
    parts = {"generator/bi_delta.safetensors", "2_Dense/config.json", "additional_chat_templates/tool_use.jinja"}
    for name in ("onnx/model.onnx", "2_Dense/config.json", "additional_chat_templates/tool_use.jinja"):
        (extra / name).parent.mkdir()
        (extra / name).write_bytes(b"kept")
        with open(extra / "SHA256SUMS", "a") as sums:
            sums.write(f"{hashlib.sha256(b'kept').hexdigest()}  {name}\n")
    push(extra, REPO, exist_ok=True)
    assert {"onnx/model.onnx", *parts} <= hub.files(REPO)

    dense = make_checkpoint(base, tmp_path / "dense", low_rank=False)
    push(dense, REPO, exist_ok=True)
    assert "onnx/model.onnx" in hub.files(REPO)
    assert not parts & hub.files(REPO), "parts of the old checkpoint"
    assert len(titles(hub)) == 4


@pytest.mark.parametrize("status", [0, 403, 503])
def test_an_interrupted_upload_commits_nothing_and_goes_on(hub, checkpoint, status):
    hub.fail("PUT", "/lfs/", status, after=4)
    with pytest.raises(ConnectionError, match=r"nothing was committed, run again") as raised:
        push(checkpoint, REPO)
    assert "\n" not in str(raised.value)
    assert titles(hub) == ["initial commit"]
    kept = sum(map(len, hub.objects.values()))
    assert kept > 0, "nothing was uploaded before the break, so nothing can be kept"
    hub.faults.clear()
    hub.received = 0
    push(checkpoint, REPO)
    assert len(titles(hub)) == 2
    large = sum((checkpoint / path).stat().st_size for path in digests(checkpoint) if path.endswith(".safetensors"))
    assert 0 < hub.received == large - kept


def test_a_hub_that_stumbles_is_asked_again(hub, checkpoint):
    hub.fail("PUT", "/lfs/", 503, after=2, times=2)
    hub.fail("POST", "/preupload/", 502, times=1)
    push(checkpoint, REPO)
    assert len(titles(hub)) == 2
    assert not hub.faults


@pytest.mark.parametrize(("status", "outcome"), [(0, "is not known"), (500, "is not known"), (413, "nothing was comm")])
def test_a_commit_that_fails(hub, checkpoint, status, outcome):
    hub.fail("POST", "/commit/", status, times=1)
    with pytest.raises(ConnectionError, match=outcome):
        push(checkpoint, REPO)
    assert titles(hub) == ["initial commit"]
    received = hub.received
    push(checkpoint, REPO)
    assert len(titles(hub)) == 2
    assert hub.received == received


def test_a_repository_that_changes_meanwhile_is_left_alone(hub, checkpoint, monkeypatch):
    from huggingface_hub import HfApi

    preupload = HfApi.preupload_lfs_files

    def with_a_rival(api, repo_id, *args, **kwargs):
        repository = hub.repositories[repo_id]
        if len(repository.commits) == 1:
            head = repository.refs["main"]
            hub.add_commit(repository, "main", Commit("rival", {}, head))
        return preupload(api, repo_id, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", with_a_rival)
    with pytest.raises(ConnectionError, match=r"changed meanwhile.*nothing was committed"):
        push(checkpoint, REPO)
    assert titles(hub) == ["rival", "initial commit"]


def test_a_killed_push_goes_on(strict, client, checkpoint, monkeypatch, tmp_path):
    strict.hold = threading.Event()
    command = [sys.executable, "-m", "ubmoe_st.cli", "push", str(checkpoint), REPO]
    process = subprocess.Popen(command, env=environment(strict.url, tmp_path / "home", HF_TOKEN=TOKEN))
    assert strict.waiting.wait(300), "no upload was started"
    process.send_signal(signal.SIGKILL)
    process.wait()
    strict.hold.set()
    strict.hold = None
    assert titles(strict) == ["initial commit"]
    client(strict.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(checkpoint, REPO)
    assert len(titles(strict)) == 2


@pytest.mark.parametrize("change", ["byte", "missing", "foreign"])
def test_a_checkpoint_that_does_not_verify_is_not_published(hub, checkpoint, tmp_path, change):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    target = folder / "model-bi.safetensors"
    if change == "byte":
        content = bytearray(target.read_bytes())
        content[-1] ^= 1
        target.write_bytes(content)
    elif change == "missing":
        target.unlink()
    else:
        with open(folder / "SHA256SUMS", "a") as sums:
            digest = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
            sums.write(f"{digest}  ../{checkpoint.name}/config.json\n")
        shutil.copytree(checkpoint, tmp_path / checkpoint.name, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"model-bi|names \.\."):
        push(folder, REPO)
    assert run("push", folder, REPO, code=1).stderr.count("\n") == 1
    assert not [line for line in hub.log if "agent-harnesses" not in line]


def test_a_dry_run_lists_and_sends_nothing(strict, client, checkpoint, monkeypatch):
    client(strict.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shown = run("push", checkpoint, REPO, "--dry-run").stdout
    facts = json.loads(run("push", checkpoint, REPO, "--dry-run", "--json").stdout)
    assert not [line for line in strict.log if "agent-harnesses" not in line]
    for path in digests(checkpoint):
        size = (checkpoint / path).stat().st_size
        assert path in shown
        if path not in ("README.md", "generator/model.safetensors.index.json"):
            assert f"{size:,}" in shown
            assert {"path": path, "bytes": size, "sha256": digests(checkpoint)[path]} in facts["files"]
    unique = {entry["sha256"]: entry["bytes"] for entry in facts["files"]}
    assert facts["bytes"] == sum(unique.values())

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(checkpoint, REPO)
    listed = {entry["path"] for entry in facts["files"]}
    assert strict.files(REPO) == {*listed, ".gitattributes"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "hf auth login"),
        ("wrong token", "token is not valid"),
        ("no network", "no connection to http://127.0.0.1:9"),
        ("no Hub", "does not answer like a Hub"),
        ("bad id", "owner/name"),
        ("foreign owner", "no right"),
        ("no folder", "is not a folder"),
        ("no checkpoint", "SHA256SUMS is missing"),
        ("no card", "does not exist"),
        ("bad front matter", "front matter"),
        ("refused card", "license"),
    ],
)
def test_bad_input_is_one_line(hub, client, checkpoint, monkeypatch, tmp_path, case, message):
    folder, repo, options = checkpoint, REPO, []
    card = tmp_path / "card.md"
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif case == "no network":
        client("http://127.0.0.1:9")
    elif case == "no Hub":
        monkeypatch.setattr(LoopbackHub, "info", lambda hub, request, **_: request.reply(200, b"<html>"))
        monkeypatch.setattr("helpers.loopback_hub.ROUTES", [("GET", "/api/models/.*", LoopbackHub.info)])
    elif case == "bad id":
        repo = "org/two words"
    elif case == "foreign owner":
        repo = "others/ubmoe-tiny"
    elif case == "no folder":
        folder = tmp_path / "absent"
    elif case == "no checkpoint":
        folder = tmp_path
    elif case == "no card":
        options = ["--card", card]
    else:
        front = "tags: [" if case == "bad front matter" else "license: nonsense"
        card.write_text(f"---\n{front}\n---\n# Card\n")
        options = ["--card", card]
    error = run("push", folder, repo, *options, code=1).stderr
    error = error[error.index("error:") :]  # in this process the client may have chosen progress bars long ago
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert all(len(repository.history()) == 1 for repository in hub.repositories.values())


def test_a_card_made_elsewhere(hub, checkpoint, tmp_path):
    card = tmp_path / "CARD.md"
    card.write_text(
        '---\nlicense: mit\n---\nSentenceTransformer("models/ubmoe-tiny")\n'
        'from_pretrained("models/ubmoe-tiny/generator")\nother("models/ubmoe-tiny-2")\n'
    )
    push(checkpoint, REPO, card=card)
    published = hub.content(REPO, "README.md").decode()
    assert f'SentenceTransformer("{REPO}")\nfrom_pretrained("{REPO}", subfolder="generator")\n' in published
    assert 'other("models/ubmoe-tiny-2")' in published
    verify_sums(download(REPO, wanted=""))


def test_the_method_has_the_stock_signature():
    own = inspect.signature(UBMoE.push_to_hub).parameters
    stock = inspect.signature(SentenceTransformer.push_to_hub).parameters
    assert [(p.name, p.kind, p.default) for p in own.values()] == [(p.name, p.kind, p.default) for p in stock.values()]


def test_the_method_publishes_what_is_in_memory(hub, checkpoint):
    model = UBMoE(str(checkpoint))
    model.prompts["query"] = "the cat "
    url = model.push_to_hub("ubmoe-tiny")  # for the owner of the token
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    folder = download(REPO, wanted="")
    assert {"README.md", "config.json"} <= set(verify_sums(folder))
    found = UBMoE(str(folder), verify=True)
    assert found.prompts["query"] == "the cat "
    assert np.array_equal(found.encode(TEXTS), model.encode(TEXTS))

    edited = hub.content(REPO, "README.md") + b"\nEdited on the site.\n"
    repository = hub.repositories[REPO]
    head = repository.commits[repository.refs["main"]]
    hub.blobs[git_sha1(edited)] = edited
    readme = File(git_sha1(edited), len(edited), large=False)
    files = {**head.files, "README.md": readme}
    hub.add_commit(repository, "main", Commit("edit", files, repository.refs["main"]))
    model.prompts["query"] = "the dog "
    model.push_to_hub("ubmoe-tiny", TOKEN, exist_ok=True)
    assert hub.content(REPO, "README.md") == edited
    verify_sums(download(REPO, wanted=""))
    model.push_to_hub("ubmoe-tiny", exist_ok=True, replace_model_card=True)
    assert hub.content(REPO, "README.md") != edited
    model.push_to_hub("ubmoe-tiny", local_model_path=str(checkpoint), create_pr=True)
    assert titles(hub, "refs/pr/1")[0] == "Upload ubmoe-tiny"


# --- loading ----------------------------------------------------------------------------------------------------

HIDE = """
import sys
sys.modules["ubmoe_st"] = None
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, package=None: None if name == "ubmoe_st" else find(name, package)
"""
STOCK = """
import json, sys
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import ubmoe_st
    raise SystemExit("the package is importable here")
except ModuleNotFoundError:
    pass
vectors = SentenceTransformer("org/ubmoe-tiny", device="cpu").encode(json.loads(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained("org/ubmoe-lm")
lm = AutoModelForCausalLM.from_pretrained("org/ubmoe-lm", subfolder="generator", trust_remote_code=True)
with torch.inference_mode():
    logits = lm(**tokenizer(json.loads(sys.argv[1])[0], return_tensors="pt")).logits
print(json.dumps({"vectors": vectors.tolist(), "logits": logits.tolist()}))
"""
BASE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
lm, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER").eval(), AutoTokenizer.from_pretrained("FOLDER")
with torch.inference_mode():
    logits = lm(**tokenizer(json.loads(sys.argv[1])[0], return_tensors="pt")).logits
print(json.dumps({"logits": logits.tolist()}))
"""
OFFLINE = """
import json, sys
from sentence_transformers import SentenceTransformer
from ubmoe_st import UBMoE
texts = json.loads(sys.argv[1])
vectors = SentenceTransformer("org/ubmoe-tiny", device="cpu").encode(texts)
print(json.dumps({"vectors": vectors.tolist(), "text": UBMoE("org/ubmoe-tiny").generate(texts[0], max_new_tokens=8)}))
"""


PARTLY = """
import json
from ubmoe_st import UBMoE
try:
    UBMoE("org/ubmoe-tiny")
except FileNotFoundError as error:
    print(json.dumps({"told": str(error)}))
"""


def fresh(script: str, tmp_path: Path, env: dict[str, str]) -> dict:
    command = [sys.executable, "-c", script, json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_generator_is_a_subfolder_for_stock_transformers(checkpoint, base):
    inputs = UBMoE(str(checkpoint)).tokenizer(TEXTS[0], return_tensors="pt")
    found, untouched, root = (
        AutoModelForCausalLM.from_pretrained(checkpoint, subfolder="generator", trust_remote_code=True),
        AutoModelForCausalLM.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(checkpoint),
    )
    with torch.inference_mode():
        logits = [lm.eval()(**inputs).logits for lm in (found, untouched, root)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2), "the root is not the generator"


def test_a_part_of_a_checkpoint_in_the_cache_and_no_network(checkpoint, base, client, monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        client(hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push(checkpoint, REPO)
        HfApi().create_repo("org/plain")
        HfApi().upload_folder(repo_id="org/plain", folder_path=base)
        part = download(REPO, wanted="", allow_patterns=["*.json", "model-*.safetensors", "1_*"])
        for folder in (part / "generator", part.parents[1] / "trees"):  # as files that were got one by one leave it
            shutil.rmtree(folder, ignore_errors=True)
        assert not (part / "generator").exists()
        with pytest.raises(CheckpointError, match="not a UBMoE checkpoint"):
            UBMoE("org/plain")  # with a network, all of it is there
    # In another process: this one knows what else the repository holds.
    nowhere = environment("http://127.0.0.1:1", tmp_path, HF_HUB_CACHE=str(tmp_path / "cache"))
    told = fresh(PARTLY, tmp_path, nowhere)["told"]
    assert "not all of it is in the cache" in told
    assert "Load it once with a network" in told


def test_a_base_comes_without_the_weights_that_stand_there_twice(base, client, monkeypatch, tmp_path):
    twice = shutil.copytree(base, tmp_path / "twice")
    (twice / "original").mkdir()
    weights = (base / "model.safetensors").read_bytes()
    for number, name in enumerate(("consolidated.safetensors", "original/model.safetensors")):
        (twice / name).write_bytes(weights + bytes([number]))  # each another file to a hash
    local = resolve_base(twice)
    assert [file.name for file in local.source_files] == ["model.safetensors"]
    recorded = {name: sha256_of(twice / name) for name in ("consolidated.safetensors", "model.safetensors")}
    assert local.has_weights(recorded)
    assert not local.has_weights({"consolidated.safetensors": recorded["consolidated.safetensors"]})
    assert not local.has_weights({})
    with LoopbackHub() as hub:
        client(hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        HfApi().create_repo("org/twice")
        HfApi().upload_folder(repo_id="org/twice", folder_path=twice)
        hub.log.clear()
        assert resolve_base("org/twice").sha256 == local.sha256
        asked = hub.requested("org/twice")
        assert "model.safetensors" in asked
        assert not asked & {"consolidated.safetensors", "original/model.safetensors"}


def test_loading_from_the_hub_and_then_from_the_cache(checkpoint, base, client, monkeypatch, tmp_path):
    """Stock libraries in a process without this package, then this package, then both without a network."""
    home = tmp_path / "home"
    local = UBMoE(str(checkpoint))
    expected = local.encode(TEXTS)
    with LoopbackHub() as hub:
        client(hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push(checkpoint, REPO)
        push(checkpoint, "org/ubmoe-lm")
        monkeypatch.delenv("HF_TOKEN")
        hub.log.clear()

        stock = fresh(HIDE + STOCK, tmp_path, environment(hub.url, home))
        assert np.allclose(stock["vectors"], expected, atol=1e-6)
        asked = hub.requested(REPO)
        assert {"model-shared.safetensors", "model-bi.safetensors", "modules.json"} <= asked
        assert not [path for path in asked if path.startswith("generator/")], "the encoder needs none of it"

        # In a process as fresh as the other: this one may run other kernels (threads) after so many tests.
        untouched = fresh(BASE.replace("FOLDER", str(base)), tmp_path, environment(hub.url, home))
        assert stock["logits"] == untouched["logits"]
        asked = hub.requested("org/ubmoe-lm")
        assert "generator/model-uni.safetensors" in asked
        assert not {"model-bi.safetensors", "model-shared.safetensors"} & asked

        with pytest.raises(FileNotFoundError, match="not all of it is in the cache"):
            UBMoE(REPO, cache_folder=home / "hub", local_files_only=True)
        found = UBMoE(REPO, cache_folder=home / "hub", verify=True)
        assert found.generate(TEXTS[0], max_new_tokens=8) == local.generate(TEXTS[0], max_new_tokens=8)
        assert np.array_equal(found.encode(TEXTS), expected)
        shown, here = (json.loads(run("info", name, "--json").stdout) for name in (REPO, checkpoint))
        assert shown["name"] == REPO
        assert {**shown, "name": 0, "bytes": 0} == {**here, "name": 0, "bytes": 0}
        assert "no such repository" in run("info", "org/absent", code=1).stderr
        with pytest.raises(FileNotFoundError, match="no such repository"):
            UBMoE("org/absent")
        with pytest.raises(FileNotFoundError, match="no such revision"):
            UBMoE(REPO, revision="absent")
        with pytest.raises(FileNotFoundError, match="no such repository"):
            resolve_base("org/absent")
    assert hub.problems == []

    offline = fresh(OFFLINE, tmp_path, environment(hub.url, home, HF_HUB_OFFLINE="1"))
    assert np.array_equal(np.array(offline["vectors"], dtype=np.float32), expected)
    assert offline["text"] == local.generate(TEXTS[0], max_new_tokens=8)
