"""One file per module of the product; `from tests.<file> import ...` shares what they build."""
