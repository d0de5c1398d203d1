"""A tokenizer whose tokens are the bytes of UTF-8, so that a character spans several of them."""

from collections.abc import Sequence


class Bytes:
    """Reads ids as bytes; what is no whole character is U+FFFD."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", errors="replace")
