"""What a user gains and loses, in words: a base's and a tuned model's answers side by side, judged if wanted.

The questions and the judging are those of MT-Bench (Zheng et al., 2023, arXiv 2306.05685): conversations of a few
turns, and a judge that compares two answers in both orders.
"""
