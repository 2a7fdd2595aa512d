"""The Hub: download a repository, publish a checkpoint in one commit, say what went wrong in a few words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubmoe_st import checkpoint
from ubmoe_st.cards import CARD, card_on_the_hub, check_front_matter

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo

_MAIN = "main"
_GENERATOR_INDEX = f"{checkpoint.GENERATOR_FOLDER}/{checkpoint.INDEX_FILE}"
_GENERATOR_SHARED = f"{checkpoint.GENERATOR_FOLDER}/{checkpoint.SHARED_FILE}"
_EMPTY = {".gitattributes"}


def download(
    repo_id: str,
    *,
    wanted: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
    whole: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """Folder of a Hub repository in the local cache; what is there already is not downloaded again.

    Args:
        repo_id: Hub id.
        wanted: What a caller could have given instead, for the message of an error.
        revision: Branch, tag or commit. None: the main branch.
        cache_dir: None: the client's own.
        token: As for `huggingface_hub`.
        local_files_only: Whether to look into the cache alone.
        allow_patterns: Globs of the files. None: all.
        ignore_patterns: Globs of files that are left out.
        whole: Asked of a folder from the cache alone, of which huggingface_hub 1 gives what there is; also where there
            is no network.

    Raises:
        FileNotFoundError: If it cannot be got; says why in one line.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=Path(cache_dir) if cache_dir is not None else None,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
            )
        )
    except hub_errors() as error:
        raise FileNotFoundError(
            f"{repo_id!r} is no local folder and cannot be got from the Hub: {hub_problem(error)}; expected {wanted}"
        ) from error
    from_cache = local_files_only or constants.HF_HUB_OFFLINE
    if not whole(folder) and (from_cache or not _answers(repo_id, revision, token)):
        raise FileNotFoundError(
            f"{repo_id!r} is no local folder, and not all of it is in the cache; expected {wanted}. "
            "Load it once with a network"
        )
    return folder


def _answers(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether the Hub can be asked for a repository; where it cannot, its client gives what is in the cache."""
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).repo_info(repo_id, revision=revision, timeout=10)
    except hub_errors():
        return False
    return True


def checkpoint_folder(name: str | os.PathLike[str], **options: Any) -> Path:
    """A folder itself, or that of a Hub id in the local cache.

    Args:
        name: Folder or Hub id of a checkpoint.
        **options: As for `download`.

    Raises:
        FileNotFoundError: If there is no such folder and it cannot be got; says why in one line.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    wanted = "a checkpoint folder or the Hub id of one"
    return download(str(name), wanted=wanted, whole=checkpoint.is_checkpoint, **options)


def facts_of(name: str) -> dict[str, Any]:
    """`checkpoint.facts` of a folder or, where there is none and the name is `owner/name`, of a Hub id.

    Raises:
        CheckpointError: If a file is missing, truncated or not valid.
        FileNotFoundError: If there is no such checkpoint.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or "/" not in name:
        return checkpoint.facts(folder)
    # The folder in the cache is called by its commit.
    return {**checkpoint.facts(checkpoint_folder(name)), "name": name}


def hub_errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises for reasons outside the program: the request, the network, the disk."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    return (HfHubHTTPError, HFValidationError, HTTPError, json.JSONDecodeError, OSError)


def hub_problem(error: BaseException) -> str:
    """What went wrong with the Hub, and what to do, in a few words.

    Args:
        error: Of `huggingface_hub`, possibly raised from another one that says more.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((found for found in chain if isinstance(found, kinds)), None)

    if first(hub.HFValidationError):
        return "a Hub id is `owner/name`, of letters, digits, '-', '_' and '.'"
    if first(hub.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and not all of it is in the cache"
    if first(hub.GatedRepoError):
        return "access to it must be asked for on its page, then log in with `hf auth login`"
    if first(hub.RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token does not open it"
    if first(hub.RevisionNotFoundError):
        return "it has no such revision"
    answer = first(hub.HfHubHTTPError)
    if isinstance(answer, hub.HfHubHTTPError):
        status = answer.response.status_code
        meaning = {
            401: "the token is not valid, log in with `hf auth login`",
            403: "the token has no right to do this, use one with write access",
            412: "the repository has changed meanwhile",
            429: "too many requests, wait a while",
        }
        said = " ".join((answer.server_message or meaning.get(status, "")).split())
        note = meaning.get(status, said)
        return f"the Hub answered {status}" + (f" ({note})" if note else "")
    if first(json.JSONDecodeError, hub.FileMetadataError):
        return f"{constants.ENDPOINT} does not answer like a Hub"
    if first(hub.LocalEntryNotFoundError) and not first(hub.HTTPError):
        return "not all of it is in the cache"
    network = first(hub.HTTPError)
    if network is not None:
        return f"no connection to {constants.ENDPOINT} ({type(network).__name__}), check the network"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Upload:
    """A file of the commit.

    Attributes:
        path: In the repository.
        source: The file on disk, or its content where that differs from the folder's.
        size: Bytes.
        sha256: Of the content; files with the same one are sent once.
    """

    path: str
    source: Path | bytes
    size: int
    sha256: str


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = False,
    card: str | os.PathLike[str] | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Publish a checkpoint in one commit: either all of it is on the Hub afterwards, or nothing has changed.

    What was uploaded before an interruption is kept by the Hub, so the same call goes on where it was. Weights of
    an older checkpoint in the repository are removed in the same commit.

    Args:
        folder: The checkpoint; every byte must match its `SHA256SUMS`.
        repo_id: `owner/name`, or `name` for the owner of the token. Created if it does not exist.
        token: With the right to write. None: of `HF_TOKEN`, or of the last `hf auth login`.
        private: Whether a new repository is private. None: as the owner's settings say.
        revision: Branch, created if it does not exist. None: main.
        commit_message: None: `Upload` and the name of the folder.
        create_pr: Open a pull request against the branch instead of committing to it.
        exist_ok: Whether a repository that has files already may be changed.
        card: Model card to publish instead of the folder's README.md.
        keep_card: Leave the card that the repository has, if it has one.

    Returns:
        The commit, with its `commit_url`, `oid` and `pr_url`; the last one if there was nothing to change.

    Raises:
        CheckpointError: If the folder is no checkpoint or does not match its checksums.
        ValueError: If the repository id is not one, or the repository is public and `private` is True.
        FileExistsError: If the repository has files and neither `exist_ok` nor `create_pr` is given.
        PermissionError: If there is no token.
        ConnectionError: If the Hub cannot be reached or refuses; says whether anything was committed.
    """
    from huggingface_hub import HfApi, get_token

    uploads = plan(folder, repo_id, card=card)
    if not (token or get_token()):
        raise PermissionError("no Hub token found: log in with `hf auth login`, or set HF_TOKEN; it needs write access")
    api = HfApi(token=token, library_name="ubmoe-st")
    name = Path(folder).resolve().name
    try:
        repo_id, state = _open_repository(api, repo_id, private, revision, exist_ok=exist_ok, create_pr=create_pr)
        files = {sibling.rfilename for sibling in state.siblings or []}
        if keep_card and CARD in files:
            kept = api.hf_hub_download(repo_id, CARD, revision=state.sha)
            uploads = _with_card(uploads, Path(kept).read_bytes())
        additions = _upload(api, repo_id, uploads, revision, create_pr)
    except hub_errors() as error:
        if isinstance(error, FileExistsError):
            raise
        raise ConnectionError(
            f"cannot publish {name} as {repo_id}: {hub_problem(error)}; nothing was committed, "
            "run again to go on from here"
        ) from error
    except RuntimeError as error:  # the client wraps what happens to a large file
        raise ConnectionError(
            f"the upload to {repo_id} broke off: {hub_problem(error)}; nothing was committed, "
            "run again and what was uploaded is not sent again"
        ) from error
    return _commit(api, repo_id, additions, files, state, commit_message or f"Upload {name}", revision, create_pr)


def plan(folder: str | os.PathLike[str], repo_id: str, *, card: str | os.PathLike[str] | None = None) -> list[Upload]:
    """Verify a checkpoint and list what a push of it uploads; needs no network.

    The files are those of `SHA256SUMS`. Three differ on the Hub: paths in the card become the repository's id; the
    folder `generator` names the shared tensors as a file of its own (the same content, stored once), because the
    Hub resolves no path out of a subfolder; and `SHA256SUMS` says so.

    Args:
        folder: The checkpoint.
        repo_id: Where it is to go.
        card: Model card instead of the folder's README.md.

    Raises:
        CheckpointError: If the folder is no checkpoint or does not match its checksums.
        ValueError: If the repository id is not one.
        FileNotFoundError: If there is no such folder or card.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    root = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no Hub id: {hub_problem(error)}") from error
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected a checkpoint made by `ubmoe build`")
    if card is not None and not Path(card).is_file():
        raise FileNotFoundError(f"the model card {card} does not exist")
    checkpoint.verify_sums(root)
    checkpoint.check_checkpoint(root)
    uploads = _listed(root)
    if card is not None or CARD in uploads:
        file = Path(card) if card is not None else root / CARD
        text = file.read_text(encoding="utf-8")
        check_front_matter(text, file)
        uploads[CARD] = _content(CARD, card_on_the_hub(text, root.resolve().name, repo_id).encode())
    _name_shared_tensors(uploads)
    return _with_sums(list(uploads.values()))


def _listed(root: Path) -> dict[str, Upload]:
    uploads = {}
    for path, digest in checkpoint.read_sums(root).items():
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise checkpoint.CheckpointError(f"{checkpoint.SUMS_FILE} names {path}, which is not in {root}")
        uploads[path] = Upload(path, root / path, (root / path).stat().st_size, digest)
    return uploads


def _content(path: str, source: bytes) -> Upload:
    return Upload(path, source, len(source), hashlib.sha256(source).hexdigest())


def _name_shared_tensors(uploads: dict[str, Upload]) -> None:
    index = uploads.get(_GENERATOR_INDEX)
    if index is None or not isinstance(index.source, Path):
        return
    content = json.loads(index.source.read_text(encoding="utf-8"))
    outside = f"../{checkpoint.SHARED_FILE}"
    if outside not in content["weight_map"].values():
        return
    content["weight_map"] = {
        key: checkpoint.SHARED_FILE if file == outside else file for key, file in content["weight_map"].items()
    }
    uploads[_GENERATOR_INDEX] = _content(_GENERATOR_INDEX, f"{json.dumps(content, indent=2)}\n".encode())
    uploads[_GENERATOR_SHARED] = replace(uploads[checkpoint.SHARED_FILE], path=_GENERATOR_SHARED)


def _with_sums(uploads: Sequence[Upload]) -> list[Upload]:
    files = sorted(
        (upload for upload in uploads if upload.path != checkpoint.SUMS_FILE), key=lambda upload: upload.path
    )
    sums = "".join(f"{upload.sha256}  {upload.path}\n" for upload in files)
    return [*files, _content(checkpoint.SUMS_FILE, sums.encode())]


def _with_card(uploads: Sequence[Upload], card: bytes) -> list[Upload]:
    return _with_sums([*(upload for upload in uploads if upload.path != CARD), _content(CARD, card)])


def _open_repository(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, *, exist_ok: bool, create_pr: bool
) -> tuple[str, ModelInfo]:
    """Find or make repository and branch; its full id, and what is at the branch now."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    else:
        if private and not found.private:
            raise ValueError(
                f"{repo_id} exists and is public, but private was asked for; change its visibility in its settings, "
                "or choose another name"
            )
        states = [found]
        if revision not in (None, _MAIN) and not (exist_ok or create_pr):
            with contextlib.suppress(RevisionNotFoundError):
                states.append(api.model_info(repo_id, revision=revision))
        there = {file.rfilename for state in states for file in state.siblings or []}
        if not (exist_ok or create_pr) and there - _EMPTY:
            raise FileExistsError(
                f"{repo_id} exists and has files; choose another name, allow changing it with exist_ok=True, "
                "or open a pull request with create_pr=True"
            )
    if revision not in (None, _MAIN) and not create_pr and not str(revision).startswith("refs/"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    return repo_id, api.model_info(repo_id, revision=revision or _MAIN)


def _upload(
    api: HfApi, repo_id: str, uploads: Sequence[Upload], revision: str | None, create_pr: bool
) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    first: list[CommitOperationAdd] = []
    again: list[CommitOperationAdd] = []
    seen: set[str] = set()
    for upload in uploads:
        source = str(upload.source) if isinstance(upload.source, Path) else upload.source
        # The second name of a content follows when the Hub has the content, so that it is not sent twice.
        (again if upload.sha256 in seen else first).append(CommitOperationAdd(upload.path, source))
        seen.add(upload.sha256)
    for additions in (first, again):
        if additions:
            api.preupload_lfs_files(
                repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False, num_threads=2
            )
    return first + again


def _commit(
    api: HfApi,
    repo_id: str,
    additions: Sequence[CommitOperationAdd],
    files: set[str],
    state: ModelInfo,
    message: str,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    # `create_commit` and not `upload_folder`, which may split a folder into several commits.
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    expected: tuple[type[Exception], ...] = (*hub_errors(), ValueError, RuntimeError)
    stale = _stale(files, {addition.path_in_repo for addition in additions})
    try:
        return api.create_commit(
            repo_id,
            [*(CommitOperationDelete(path) for path in stale), *additions],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else state.sha,
        )
    except expected as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        refused = answered or type(error) is ValueError  # the client's own check of what it is to send
        outcome = (
            "nothing was committed, run again to go on from here"
            if refused
            else f"whether the commit was made is not known: look at {api.endpoint}/{repo_id}, or run again, "
            "what is there already is not committed twice"
        )
        raise ConnectionError(f"cannot commit to {repo_id}: {hub_problem(error)}; {outcome}") from error


def _stale(files: set[str], new: set[str]) -> list[str]:
    """Files of an older checkpoint, which loaders would take for parts of this one."""
    ours = {file for file in files if file.startswith(f"{checkpoint.GENERATOR_FOLDER}/")}
    ours |= {file for file in files if checkpoint.is_part(file.partition("/")[0])}
    return sorted(ours - new)
