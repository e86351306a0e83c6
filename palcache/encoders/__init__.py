"""Encoders: frozen models that turn texts into vectors, behind one protocol."""

from palcache.encoders.protocols import Encoder, KeptTokens, Role, StateEncoder, States, TokenizedTexts

__all__ = ["Encoder", "KeptTokens", "Role", "StateEncoder", "States", "TokenizedTexts"]
