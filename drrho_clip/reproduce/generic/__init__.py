"""DRRho risk minimisation without images and captions: classifiers and a language model, in NumPy alone.

``problems.py`` draws the samples, ``network.py`` has the model with gradients in closed form, ``objectives.py`` turns
the losses of a batch into weights with the public functions of drrho_core, and ``measuring.py`` trains and measures.
"""
