"""The model in the box: a Hugging Face folder that ships with the package, and what it was taught.

`tasks` makes its questions, `format` writes them as ids; training, evaluation and tests share both.
"""
