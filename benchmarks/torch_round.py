"""A round of DeepCluster as a competent user of PyTorch, Pillow and faiss writes it in an afternoon."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.torch_networks import Clusterer, convnet

WORKERS = 2


class Photos(Dataset):
    """(image uint8 [C, S, S], id) of each file, decoded whenever it is asked for."""

    def __init__(self, paths: list[Path], side: int, view: ConfigDict | None = None) -> None:
        self.paths, self.side, self.view = paths, side, view

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.open(self.paths[i]).convert("RGB")
        image = augmented(image, self.side, self.view) if self.view else centred(image, self.side)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), i


def centred(image: Image.Image, side: int) -> Image.Image:
    """The short side resized to 8/7 of the wanted one and the centre cut out; an image of the right size stays."""
    if image.size == (side, side):
        return image
    scale = round(side * 8 / 7) / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def augmented(image: Image.Image, side: int, view: ConfigDict) -> Image.Image:
    """A random resized crop, a flip, brightness, contrast and saturation."""
    area = random.uniform(view.crop_area, 1) * image.width * image.height
    aspect = math.exp(random.uniform(math.log(view.crop_aspect), -math.log(view.crop_aspect)))
    width = min(math.sqrt(area * aspect), image.width)
    height = min(math.sqrt(area / aspect), image.height)
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    image = image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if random.random() < view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(random.uniform(1 - view.brightness, 1 + view.brightness))
    image = ImageEnhance.Contrast(image).enhance(random.uniform(1 - view.contrast, 1 + view.contrast))
    return ImageEnhance.Color(image).enhance(random.uniform(1 - view.saturation, 1 + view.saturation))


class Order:
    """A sampler whose ids are drawn anew in each round."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


class Run:
    """The state of a run with the settings of a config of jaxclust, and its rounds."""

    def __init__(self, folder: Path, workdir: Path, config: ConfigDict) -> None:
        self.config, self.checkpoint = config, workdir / "checkpoint.pt"
        paths, side = sorted(folder.rglob("*.jpg")), config.data.image_size
        self.labels = [path.parent.name for path in paths]
        self.clusters: np.ndarray | None = None
        self.order = Order()
        workers: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True}
        self.images = DataLoader(Photos(paths, side), config.eval_batch_size, **workers)
        augmented = Photos(paths, side, config.views.train)
        self.views = DataLoader(augmented, config.batch_size, sampler=self.order, **workers)
        self.model: Clusterer = convnet(3, config.cluster.k, side=side).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.body.parameters(), config.optimizer.body.lr)
        self.steps = -(-len(paths) // config.batch_size)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps * config.rounds)
        self.mean, self.std = (torch.tensor(c)[:, None, None] for c in (config.data.mean, config.data.std))

    def round(self) -> dict[str, float]:
        """Seconds of each part of the next round."""
        clock, marks = time.perf_counter(), defaultdict[str, float](float)

        def mark(part: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            marks[part] += now - clock
            clock = now

        features = self.features()
        mark("features")
        clusters = self.cluster(features)
        mark("clustering")
        self.log(clusters)
        mark("other")
        self.train(clusters)
        mark("training")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.checkpoint)
        mark("other")
        return dict(marks)

    def standardized(self, images: Tensor) -> Tensor:
        """What the network sees."""
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self) -> np.ndarray:
        """The feature of every image, in order."""
        self.model.eval()
        return np.concatenate([self.model.body(self.standardized(images)).numpy() for images, _ in self.images])

    def cluster(self, features: np.ndarray) -> np.ndarray:
        """PCA-whitening, unit rows, k-means: a cluster for every image."""
        c = self.config.cluster
        pca = faiss.PCAMatrix(features.shape[1], c.pca_dim, -0.5)
        pca.train(features)
        points = pca.apply(features)
        faiss.normalize_L2(points)
        options = {"max_points_per_centroid": len(points), "seed": random.randrange(2**31)}
        kmeans = faiss.Kmeans(c.pca_dim, c.k, niter=c.iterations, nredo=c.runs, **options)
        kmeans.train(points)
        clusters: np.ndarray = kmeans.assign(points)[1]
        return clusters

    def log(self, clusters: np.ndarray) -> None:
        """How the clusters agree with the classes and with the last ones."""
        scores = [normalized_mutual_info_score(self.labels, clusters)]
        if self.clusters is not None:
            scores.append(normalized_mutual_info_score(self.clusters, clusters))
        self.clusters = clusters

    def train(self, clusters: np.ndarray) -> None:
        """A new top layer, then one pass over images drawn uniformly over clusters."""
        model = self.model
        torch.nn.init.normal_(model.top.weight, std=0.01)
        torch.nn.init.zeros_(model.top.bias)
        top = torch.optim.Adam(model.top.parameters(), self.config.optimizer.top.lr)
        self.order.ids = drawn(clusters, self.steps * self.config.batch_size)
        targets = torch.from_numpy(clusters)
        model.train()
        for images, ids in self.views:
            loss = torch.nn.functional.cross_entropy(model(self.standardized(images)), targets[ids])
            self.optimizer.zero_grad()
            top.zero_grad()
            loss.backward()
            self.optimizer.step()
            top.step()
            self.schedule.step()


def drawn(clusters: np.ndarray, count: int) -> list[int]:
    """Ids of which each cluster has the same share, shuffled."""
    rng = np.random.default_rng()
    found = np.unique(clusters)
    quota = count // len(found) + 1
    members = (np.flatnonzero(clusters == cluster) for cluster in found)
    ids = np.concatenate([rng.choice(of, quota, replace=len(of) < quota) for of in members])
    return rng.permutation(ids)[:count].tolist()
