"""The estimator of SogCLR: the errors of the inner estimates and of the gradient, and their effect on a trained model.

``pairs.py`` draws frozen features of pairs, ``heads.py`` has two linear heads with gradients in closed form,
``rules.py`` the rules for gamma, ``training.py`` trains the heads, and ``errors.py`` compares the estimates with those
of the full data along a training.
"""
