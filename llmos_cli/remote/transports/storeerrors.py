"""What went wrong at an object store, from the text of an obstore error, in our own words.

The texts themselves are never shown: they may hold signed addresses.
"""

import re
from typing import Final

from llmos_cli.errors import AccessDenied, LlmosError, NoSpace, NotFound, RemoteUnavailable, Unsafe

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<(?:\w+:)?Code>([A-Za-z]{1,64})</")
_KIND: Final = re.compile(r"kind: (\w+)")
_FULL: Final = {
    "QuotaExceeded",
    "QuotaExceededException",
    "InsufficientStorage",
    "AccountQuotaExceeded",
    "EntityTooLarge",
}
_NO_BUCKET: Final = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
_CLOCK: Final = {"RequestTimeTooSkewed", "RequestExpired"}
_EXPIRED: Final = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_TAKEN: Final = {"BlobAlreadyExists", "ResourceAlreadyExists"}
_REGION: Final = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_ELSEWHERE: Final = (302, 303, 307, 308)
_REDIRECT: Final = "following redirect"
_NO_CREDENTIALS: Final = ("169.254.169.254", "169.254.170.", "token request", "MissingCredentials", "No credentials")
_KINDS: Final = {
    "Timeout": "no answer in time",
    "Connect": "no connection",
    "Request": "the connection broke",
    "Interrupted": "the connection broke",
    "Decode": "the answer makes no sense",
}
_WHERE_CREDENTIALS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for profiles in ~/.aws: pip install 'llmos[aws]'",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN)",
    "http": "the server wants a login, which llmos has none for",
}
TRY_AGAIN: Final = "check the network and the address, then run the command again: it goes on with what has arrived"


class NoBucket(NotFound):
    """Not a key is missing, but the place for all of them."""


def status_of(exc: BaseException) -> int | None:
    """The HTTP status that ended a request; None if there was no answer."""
    found = _STATUS.search(str(exc))
    return int(found[1]) if found else None


def is_range_past_end(exc: BaseException) -> bool:
    return status_of(exc) == 416 or "StartTooLarge" in str(exc)


def is_unsure(exc: BaseException) -> bool:
    """Whether a request that failed so may have been carried out, or may be carried out if it is asked again."""
    status, found = status_of(exc), _CODE.search(str(exc))
    if status is not None:
        return status >= 500 or (status in (408, 409, 429) and not (found and found[1] in _TAKEN))
    return not isinstance(exc, OSError | ValueError) and not is_plain_http(exc) and not _lacks_credentials(str(exc))


def is_plain_http(exc: BaseException) -> bool:
    """Whether a request was not even sent because its endpoint is http:// and nobody has allowed that."""
    text = str(exc)
    return "kind: Builder" in text and "BadScheme" in text and _REDIRECT not in text


def translate(exc: BaseException, scheme: str, url: str, what: str, key: str | None = None) -> LlmosError:
    """The LlmosError for an error of obstore met while doing `what`; `key` is what a 404 is about."""
    text = str(exc)
    status, found = status_of(exc), _CODE.search(text)
    code = found[1] if found else ""
    said = f" ({code or status})" if code or status else ""
    if code in _NO_BUCKET or (status == 404 and key is None):
        return NoBucket(
            f"there is no such bucket, or no such place: {url}", hint="make the bucket, or correct the address"
        )
    if isinstance(exc, FileNotFoundError) or status == 404:
        return NotFound(f"{key} is not at {url}")
    if status == 507 or code in _FULL or status == 413:
        return NoSpace(
            f"no space left at {url} while {what}{said}",
            hint="free some space there and run the command again: it goes on with what has arrived",
        )
    if code in _CLOCK:
        return AccessDenied(
            f"{url} refused {what}: this machine's clock is wrong{said}", hint="set the clock: timedatectl"
        )
    if code in _EXPIRED:
        return AccessDenied(
            f"{url} refused {what}: the credentials have expired{said}",
            hint="renew them and run the command again: it goes on with what has arrived",
        )
    if code in _REGION or status == 301:
        return AccessDenied(
            f"{url} refused {what}: the bucket is in another region{said}", hint="set AWS_REGION, or write ?region=NAME"
        )
    if status in _ELSEWHERE or _REDIRECT in text:
        return Unsafe(
            f"{url} sends on to another address while {what}, which is not followed{said}",
            hint="write the address that it means, if you trust that one",
        )
    if _lacks_credentials(text):
        return AccessDenied(f"no credentials for {url}", hint=_WHERE_CREDENTIALS[scheme])
    if status in (401, 403) or type(exc).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return AccessDenied(f"{url} refused {what}{said}", hint=f"check the credentials: {_WHERE_CREDENTIALS[scheme]}")
    if "MissingAccount" in text:
        return AccessDenied(
            f"no account is named for {url}", hint="write ?account=NAME, or set AZURE_STORAGE_ACCOUNT_NAME"
        )
    if type(exc).__name__ == "InvalidPathError":
        return Unsafe(f"{url} holds a key that is no path", hint="use a prefix of its own for llmos: s3://BUCKET/llmos")
    if "NotPartial" in text or type(exc).__name__ == "NotSupportedError":
        return RemoteUnavailable(
            f"{url} does not answer requests for a range of bytes", hint="use a server that does, such as nginx"
        )
    return RemoteUnavailable(f"{url} cannot be reached while {what}: {_reason(text, status, code)}", hint=TRY_AGAIN)


def _lacks_credentials(text: str) -> bool:
    return any(word in text for word in _NO_CREDENTIALS)


def _reason(text: str, status: int | None, code: str) -> str:
    if status:
        return f"it answers {status}{f' {code}' if code else ''}"
    kinds = [_KINDS[kind] for kind in _KIND.findall(text) if kind in _KINDS]
    return kinds[0] if kinds else "the request failed"
