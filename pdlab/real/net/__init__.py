"""Sockets, TLS, connections, and what passes over them."""
