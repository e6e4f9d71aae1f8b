"""Failures of the Hub in words that help, and which of them are worth another try."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import errors as hub

from llama4_quant.errors import HubError, Llama4QuantError

RETRY_DELAYS = (1.0, 4.0, 16.0)
"""Seconds before each further try; the client's own tries come on top."""

_NOT_OF_THE_NETWORK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}

T = TypeVar("T")


@contextmanager
def hub_errors(at: str, repository: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into a HubError that opens with `at` and says what to do."""
    try:
        yield
    except Llama4QuantError:
        raise
    except hub.GatedRepoError as problem:
        raise HubError(
            f"{at}: access is restricted; accept the licence at https://huggingface.co/{repository} and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from problem
    except hub.RevisionNotFoundError as problem:
        raise HubError(f"{at}: the repository has no such revision; give a branch, tag or commit") from problem
    except hub.RepositoryNotFoundError as problem:
        raise HubError(
            f"{at}: neither a local folder nor a repository that you can see on the Hub; check the spelling, and log "
            "in with `hf auth login` if it is private"
        ) from problem
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as problem:
        raise HubError(
            f"{at}: not complete in the local cache, and the Hub cannot be reached (no connection, or HF_HUB_OFFLINE "
            f"is set); connect, or give the path of a local folder. The Hub client says: {_first_line(problem)}"
        ) from problem
    except hub.HfHubHTTPError as problem:
        raise HubError(f"{at}: {_refusal(problem)}") from problem
    except Exception as problem:  # the client's transport, and so its errors, differ by version
        if type(problem).__name__ in {"ConnectError", "ConnectTimeout"}:
            raise HubError(
                f"{at}: the Hub cannot be reached: {_first_line(problem)}; check the connection (and HF_ENDPOINT and "
                "proxies), or give the path of a local folder"
            ) from problem
        raise HubError(
            f"{at}: the download failed: {_first_line(problem)}; run the command again, it resumes"
        ) from problem


def _refusal(problem: hub.HfHubHTTPError) -> str:
    status = problem.response.status_code
    if status == 401:
        return (
            "the Hub asks for a valid token (401); log in with `hf auth login` or set HF_TOKEN, and replace one "
            "that has expired"
        )
    if status == 403:
        return (
            f"the token does not give access (403: {problem.server_message or 'no reason given'}); give it the right "
            "to read this repository at https://huggingface.co/settings/tokens, or use another one"
        )
    return f"the Hub refused: {_first_line(problem)}; run the command again later, it resumes"


def with_retries(action: Callable[[], T]) -> T:
    """Do something over the network, again if it fails for a reason that may pass."""
    for delay in RETRY_DELAYS:
        try:
            return action()
        except Exception as problem:
            if not _may_pass(problem):
                raise
        time.sleep(delay)
    return action()


def _may_pass(problem: Exception) -> bool:
    if isinstance(problem, hub.HfHubHTTPError):
        return problem.response.status_code >= 500
    if isinstance(problem, (Llama4QuantError, hub.OfflineModeIsEnabled)):
        return False
    return getattr(problem, "errno", None) not in _NOT_OF_THE_NETWORK


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
