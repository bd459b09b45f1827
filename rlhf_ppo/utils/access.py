"""Who may reach a server: loopback addresses, and tokens compared in constant time."""

import base64
import binascii
import hmac
import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_authorized(header: str | None, token: str | None) -> bool:
    """Whether an `Authorization` header carries the token, as `Bearer TOKEN` or as the password of `Basic`.

    Args:
        token: The server's token; None lets everyone in.
    """
    if token is None:
        return True
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())
