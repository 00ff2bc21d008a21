"""Evaluation: one question to an OpenAI-compatible server: what is worth another try, and how long to wait."""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

__all__ = ["Endpoint", "EndpointError", "RefusedError", "Reply", "UnreachableError"]

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
LONGEST_RETRY_AFTER = 600.0
_REFUSED = (400, 413, 422)  # this request is not taken (a content filter, too long); another may be
_TEMPORARY = (408, 425, 429)


class EndpointError(RuntimeError):
    """No request of this kind can succeed: a wrong address, key or model."""


class RefusedError(RuntimeError):
    """The server will not take this request."""


class UnreachableError(RuntimeError):
    """All tries failed in a way that may pass: time-outs, overload, errors of the server, a broken connection."""


@dataclass(frozen=True)
class Reply:
    """What the server said: `text` (None for nothing), whether it was `cut_off` at the limit, tokens if it counts."""

    text: str | None
    cut_off: bool
    prompt_tokens: int | None
    completion_tokens: int | None


class Endpoint:
    """A chat model behind `huggingface_hub.InferenceClient`.

    Args:
        model: name of the model on the server, or Hub id for a provider.
        base_url: of an OpenAI-compatible server, such as "http://localhost:8000/v1"; else `provider` serves.
        provider: one of `InferenceClient`'s.
        api_key: for either. Without one a provider gets the user's Hub token, but a `base_url` never does.
        timeout: seconds to wait for the server's next sign of life.
        retries: tries after the first.
        backoff: seconds before the second try, doubled each time; what Retry-After asks for counts when it is longer.
        max_tokens: longest reply, thinking included; None leaves it to the server.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        provider: Any,
        api_key: str | None,
        timeout: float,
        retries: int,
        backoff: float,
        max_tokens: int | None,
    ) -> None:
        if base_url is not None and provider is not None:
            raise ValueError("a judge is behind base_url or behind a provider: give one of them.")
        if base_url is not None and api_key is None:
            api_key = "EMPTY"  # with none at all the client would send the user's Hub token to that server
        self.model, self.retries, self.backoff, self.max_tokens = model, retries, backoff, max_tokens
        self._client = InferenceClient(base_url=base_url, provider=provider, api_key=api_key, timeout=timeout)
        self._own_server = base_url is not None
        self._random = random.Random()  # the global one belongs to the run

    def ask(self, messages: list[dict[str, str]], stop: Event) -> Reply:
        """Return the reply to a chat at temperature 0.

        Args:
            messages: with "role" and "content".
            stop: ends the waiting between two tries.

        Raises:
            EndpointError, RefusedError, UnreachableError: as they say.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._ask_once(messages)
            except _TemporaryError as error:
                problem, asked = str(error), error.wait
            if attempt < self.retries:
                wait = min(self.backoff * 2**attempt, LONGEST_WAIT) * self._random.uniform(0.75, 1.25)
                wait = max(wait, min(asked, LONGEST_RETRY_AFTER))
                logger.info("the judge's endpoint failed (%s); next try in %.1f s", problem, wait)
                if stop.wait(wait):
                    raise UnreachableError(problem)
        raise UnreachableError(f"{problem} ({self.retries + 1} tries)")

    def _ask_once(self, messages: list[dict[str, str]]) -> Reply:
        try:
            output = self._client.chat_completion(
                messages, model=self.model, temperature=0.0, max_tokens=self.max_tokens
            )
        except OfflineModeIsEnabled as error:
            raise EndpointError(
                "HF_HUB_OFFLINE=1 keeps huggingface_hub from every request, also to a server of your own: unset it "
                "for the judge"
            ) from error
        except HfHubHTTPError as error:
            raise _from_status(error) from error
        except (HTTPError, OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            # time-outs, broken connections, and a body that is no answer at all
            raise _TemporaryError(f"{type(error).__name__}: {error}"[:300]) from error
        except ValueError as error:
            if self._own_server:  # JSON, but of another form
                raise _TemporaryError(str(error)[:300]) from error
            raise EndpointError(str(error)) from error  # no key, or a provider that does not have the model
        return _as_reply(output)


class _TemporaryError(RuntimeError):
    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def _from_status(error: HfHubHTTPError) -> RuntimeError:
    status = error.response.status_code
    message = f"HTTP {status}: {_body(error)}"
    if status in _TEMPORARY or status >= 500:
        return _TemporaryError(message, _retry_after(error.response.headers.get("retry-after")))
    return RefusedError(message) if status in _REFUSED else EndpointError(message)


def _body(error: HfHubHTTPError) -> str:
    try:
        text = error.response.text
    except RuntimeError:  # a streamed body that was not read; what the library made of it has to do
        text = ""
    return " ".join((text or str(error)).split())[:300]


def _retry_after(value: str | None) -> float:
    """Return the seconds a Retry-After header asks for, given as a number or a date; 0 when it makes no sense."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0


def _as_reply(output: Any) -> Reply:
    choices = getattr(output, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        raise _TemporaryError(f"the body is no chat completion: {str(output)[:200]}")
    text = getattr(message, "content", None)
    usage = getattr(output, "usage", None)
    return Reply(
        text if isinstance(text, str) else None,
        getattr(choice, "finish_reason", None) == "length",
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else None
