"""Commands against a running server: chat, ps, adapter put and the like."""
