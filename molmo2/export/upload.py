"""Upload an export to the Hugging Face hub, or to the hub at `HF_ENDPOINT`.

A repository that is created here is private; publishing it is left to the user. A repository with other files than
those of an export is never changed.
"""

from __future__ import annotations

from pathlib import Path

MARK = "export.json"  # a file that every export has, and by which an export is recognised


class PushError(ValueError):
    """A repository cannot be written to, or holds something else than an export."""


def check_repository(repo: str) -> None:
    """Check before an export that there is a token, and that `repo` is absent, empty or an earlier export.

    Raises:
        PushError: there is no token, the name is invalid, the repository has other files, or the hub does not answer.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    if repo.count("/") != 1:
        raise PushError(f"{repo}: write OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise PushError("uploading to the hub needs a token: run `hf auth login`, or set HF_TOKEN")
    try:
        names = set(huggingface_hub.list_repo_files(repo)) - {".gitattributes"}
    except RepositoryNotFoundError:
        return
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _push_error(repo, error) from error
    if names and MARK not in names:
        raise PushError(f"{repo}: holds {len(names)} files and is not an earlier export; choose another repository")


def push(directory: Path, repo: str, message: str) -> str:
    """Replace the files of `repo` by those of an export; a repository that does not exist is created, private.

    Returns:
        The URL of the commit.

    Raises:
        PushError: the hub refuses or does not answer; the repository's files are unchanged.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    check_repository(repo)
    try:
        huggingface_hub.create_repo(repo, private=True, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repo, folder_path=directory, commit_message=message, delete_patterns=["*"]
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _push_error(repo, error) from error
    return str(commit.commit_url)


def _push_error(repo: str, error: Exception) -> PushError:
    """The error of a request to the hub, in one line with its cause."""
    reasons = [" ".join(str(e).split()) or type(e).__name__ for e in (error, error.__cause__) if e is not None]
    return PushError(f"{repo}: the upload was refused by the hub: {'; '.join(reasons)}")
