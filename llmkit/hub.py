"""Whether the Hugging Face Hub can be asked. Where it cannot, a library tries again and again for a minute per file."""

import functools
import sys
from pathlib import Path

_TIMEOUT_S = 20


def local_only(name: str) -> bool:
    """Whether a model or tokenizer is to be taken from this machine alone: from its folder, or from what is kept of it.

    So where a name is not on this machine and there is no network, what loads it says so at once; and where a copy
    is kept, as on nodes of a cluster without network, it is taken without waiting.

    Args:
        name: A folder, or a name on the Hub.
    """
    return Path(name).expanduser().exists() or not _answers(name)


def network_errors() -> tuple[type[Exception], ...]:
    """What asking the Hub can raise; its HTTP client has changed before, so whichever is loaded counts."""
    clients = [sys.modules[name] for name in ("httpx", "httpx2", "requests") if name in sys.modules]
    return (OSError, *(client.HTTPError for client in clients if hasattr(client, "HTTPError")))


@functools.cache  # once per name and process: a model is looked for by several
def _answers(name: str) -> bool:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().model_info(name, timeout=_TIMEOUT_S)
    except RepositoryNotFoundError:
        return True  # what transformers says about it is good
    except (
        network_errors()
    ) as error:  # nobody there, or told to stay offline; or an answer, not the one asked for
        status = getattr(getattr(error, "response", None), "status_code", None)
        return status is not None and bool(status < 500)
    except ValueError:  # this can be no name on the Hub
        return False
    return True
