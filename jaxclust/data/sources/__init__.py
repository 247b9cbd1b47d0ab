"""One module per kind of `config.data.source`, found by the name before the colon.

Each has `read(where, settings) -> Source`: `where` is the text after the colon, `settings` is
`config.data`.
"""
