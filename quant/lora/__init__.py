"""Adapters on disk: read, judged, merged, mixed and made ready for an artifact."""
