"""Encryption: LUKS headers and key slots, sector ciphers, key derivation, secrets."""
