"""Encoders: frozen models that turn texts into vectors, behind one protocol."""

from palcache.encoders.protocols import Encoder, Role, TokenizedTexts

__all__ = ["Encoder", "Role", "TokenizedTexts"]
