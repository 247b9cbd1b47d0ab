"""The settings of pictures and pages, `config.report`."""

import math

from jaxclust.kinds import choice, flag, number, some, text, whole_numbers

REPORT = {
    "pictures": text("first_layer,tsne", "pictures that --job=report draws, separated by commas"),
    "stage": text(
        "", "the stage whose network and views are pictured; empty, or one that the run leaves out: the last one"
    ),
    "split": choice(
        "auto", ("train", "test"), "images that are pictured; auto: train for tsne and umap, else test if there is one"
    ),
    "nets": whole_numbers("", "of a sweep the runs that are pictured, by their place from 1; empty: all"),
    "without_nets": whole_numbers("", "of a sweep the runs that are not"),
    "epochs": whole_numbers("", "pictured ones; empty: the last for confusion, failures, reconstructions, else all"),
    "layers": text("", "filters, activations: layers such as 'conv1,conv3', separated by commas; empty: all"),
    "channels": number(16, 0, math.inf, "filters, activations: the first so many of each layer; 0: all"),
    "sample": number(1000, 10, 100_000, "tsne, umap, spectral, projector (500 at most): images that are shown"),
    "pixels": flag(False, "tsne, umap: whether the images are shown by their pixels too"),
    "tsne": {
        "rate": number(0.0, 0.0, math.inf, "learning rate of t-SNE; 0: by the number of images, as scikit-learn does"),
        "layer": text("feature", "what it is of: the features, or a layer's maps, such as 'encoder/conv2'"),
    },
    "filters": {
        "steps": some((1000,), 1, 10_000_000, "steps of gradient ascent, for all layers or for each"),
        "lr": some((3.0,), 0.0, 1e6, "length of a step, for all layers or for each"),
        "weight_decay": number(1e-5, 0.0, math.inf, "factor of the squared image in what is climbed"),
        "every": number(5, 1, math.inf, "the image is blurred in the first of so many steps"),
        "sigma": number(0.3, 0.0, 10.0, "width of this blur in pixels"),
    },
    "activations": {
        "count": number(9, -1, math.inf, "images of each channel; 0 or less: all"),
    },
    "weights": {
        "elementwise": flag(False, "whether each weight's change is divided by its own first value"),
    },
    "map_variance": {
        "layer": number(0, 0, 100, "convolution of the experts, from 1; 0: what they are given"),
        "stat": choice("std", ("var",), "standard deviation or variance"),
    },
}
