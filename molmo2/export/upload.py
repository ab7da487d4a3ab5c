"""Uploading an export to the Hugging Face hub (`HF_ENDPOINT` names another one).

A repository that is made here is private: publishing is a decision of its own. A repository that holds something else
than an export is left alone.
"""

from __future__ import annotations

from pathlib import Path

MARK = "export.json"  # a file that every export has, see `molmo2.export.model`


class PushError(ValueError):
    """A repository that cannot be written to, or that must not be."""


def check_repository(repo: str) -> None:
    """Before the long work: is there a token, and is `repo` absent, empty or an earlier export?

    Raises:
        PushError: no token, an impossible name, other files in it, or no answer.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    if repo.count("/") != 1:
        raise PushError(f"{repo}: write OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise PushError("the hub wants a token to upload: run `hf auth login`, or set HF_TOKEN")
    try:
        names = set(huggingface_hub.list_repo_files(repo)) - {".gitattributes"}
    except RepositoryNotFoundError:
        return
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _told(repo, error) from error
    if names and MARK not in names:
        raise PushError(f"{repo}: holds {len(names)} files and is no earlier export; choose another repository")


def push(directory: Path, repo: str, message: str) -> str:
    """Make `repo` hold the files of an export and no others; it is created, private, if it is not there.

    Returns:
        The commit's address.

    Raises:
        PushError: the hub refuses or does not answer; what stood there before stays.
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
        raise _told(repo, error) from error
    return str(commit.commit_url)


def _told(repo: str, error: Exception) -> PushError:
    """The hub's refusal, or that it cannot be reached, in one line with its cause."""
    told = [" ".join(str(e).split()) or type(e).__name__ for e in (error, error.__cause__) if e is not None]
    return PushError(f"{repo}: the hub did not take it: {'; '.join(told)}")
