"""One module per kind of `config.data.source`, found by the name before the colon.

Each has `read(where, settings) -> Source`: `where` is the text after the colon, `settings` is
`config.data`. A data set that is for retrieval of unseen classes has the usual `data.train_classes` as TRAIN_CLASSES.
"""
