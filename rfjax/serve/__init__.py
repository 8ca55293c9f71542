"""A live server: each viewer's stream in a browser, prompted while it plays, all of them in one batch on one accelerator.

`protocol.py` says what viewer and server tell each other, `engine.py` makes the frames in one thread, `app.py` holds the
sockets, `wire.py` guards what lies under them, `metrics.py` counts, `static/` is the page. docs/serve.md describes it from outside.
"""
