"""How fast is it? Text, network, decoder and the whole stream, timed on the machine at hand.

`parts.py` times each program alone, `stream.py` a stream as its viewer sees it, `first.py` how long the first frame takes.
`formula.py` counts the operations, `stamp.py` says on what all of it ran, `report.py` prints it, `compare.py` sets two runs
side by side, and `roofline.py` says what a chip could do at best. docs/latency.md says how to read the figures.
"""
