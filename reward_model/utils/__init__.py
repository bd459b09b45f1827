"""Helpers that commands and configurations share."""
