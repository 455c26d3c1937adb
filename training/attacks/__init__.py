"""What a curious server recovers of the text from the rows it is sent, with nothing but public weights.

An attack is a class with `recover(rows)`; two are built in, others are plug-ins (`module:Class`).
"""
