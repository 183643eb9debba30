"""The measurements of trained models: a training, the variances of losses, and how well a reference model steers."""
