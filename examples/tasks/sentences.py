"""Kim's CNN that tells whether a sentence praises or pans a film: MR, tenfold cross-validation, CNN-rand.

    gradcomp train examples/tasks/sentences.py --set data=rt-polaritydata --workers 4 --compressor threshold

The folder holds rt-polarity.pos and rt-polarity.neg, 5,331 sentences each
(https://www.cs.cornell.edu/people/pabo/movie-review-data/, "sentence polarity dataset v1.0"). Yoon Kim, "Convolutional
neural networks for sentence classification" (2014), has 76.1 % for word vectors that are learnt from nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from gradcomp.examples.tasks.activations import Activation, nonlinearity
from gradcomp.examples.tasks.sentences_data import FOLDS, PADDING, load_sentences, split_fold
from gradcomp.integrations.tasks import Task
from gradcomp.options import check_integer

DIMENSIONS = 300  # of a word's vector
WIDTHS, MAPS = (3, 4, 5), 100
MAX_NORM = 3.0


class MaxNorm(nn.Module):
    """Rows of a matrix, none of them longer than MAX_NORM.

    The paper shortens rows after each step of the optimizer. What is done where the weights are used holds wherever the
    step is made, on a parameter server too.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Shorten the rows that are longer."""
        return torch.renorm(weight, 2, 0, MAX_NORM)


class SentenceCNN(nn.Module):
    """The largest value of each feature map over the sentence, for windows of 3, 4 and 5 words.

    Args:
        words: in the vocabulary.
        activation: of the feature maps.
    """

    def __init__(self, words: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.vectors = nn.Embedding(words + 1, DIMENSIONS, padding_idx=PADDING)
        windows = [nn.Conv1d(DIMENSIONS, MAPS, width, padding=width - 1) for width in WIDTHS]
        self.windows = nn.ModuleList(windows)
        self.activation = nonlinearity(activation)
        self.dropout = nn.Dropout()
        self.classes = nn.Linear(MAPS * len(WIDTHS), 2)
        with torch.no_grad():  # as in Kim's own code: small filters leave it to the words to find out what they mean
            self.vectors.weight[1:].uniform_(-0.25, 0.25)
            for window in windows:
                weight, bias = window.parameters()
                bound = 0.01 if activation == "relu" else math.sqrt(6 / ((DIMENSIONS + MAPS) * weight.shape[2]))
                weight.uniform_(-bound, bound)
                bias.zero_()
            self.classes.weight.normal_(0, 0.01)
            self.classes.bias.zero_()
        parametrize.register_parametrization(self.classes, "weight", MaxNorm())

    def forward(self, sentences: Tensor) -> Tensor:
        """Word numbers (n, longest) to (n, 2)."""
        # Windows of nothing but padding are all alike: one place of it behind the batch's longest sentence is enough.
        longest = int((sentences != PADDING).sum(1).max())
        vectors = self.vectors(sentences[:, : longest + 1]).transpose(1, 2)
        maps = [self.activation(window(vectors).amax(2)) for window in self.windows]
        return self.classes(self.dropout(torch.cat(maps, 1)))  # type: ignore[no-any-return]


def task(
    *,
    data: str,
    fold: int = 0,
    activation: Activation = "relu",
    optimizer: Literal["adam", "adadelta", "sgd"] = "adam",
    lr: float | None = None,
    limit: int | None = None,
    batch_size: int = 50,
    epochs: int = 10,
) -> Task:
    """Options: the data's folder, which fold of 0 to 9 to test on, and the optimizer.

    The paper's is Adadelta, for a batch of 50; at the larger batches of several workers Adam is ahead of it.
    ``limit`` is for a run on so many training sentences only.
    """
    check_integer("sentences", "fold", fold, at_least=0, at_most=FOLDS - 1)
    rows, labels, words = load_sentences(Path(data))
    train, test = split_fold(labels, fold)
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))][:limit]
    model = SentenceCNN(words, activation)
    chosen: Optimizer
    if optimizer == "adadelta":
        chosen = torch.optim.Adadelta(model.parameters(), lr=1.0 if lr is None else lr, rho=0.95, eps=1e-6)
    elif optimizer == "adam":
        chosen = torch.optim.Adam(model.parameters(), lr=1e-3 if lr is None else lr, fused=True)
    else:
        chosen = torch.optim.SGD(model.parameters(), lr=0.1 if lr is None else lr, momentum=0.5)
    return Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=chosen,
        train_data=(rows[train], labels[train]),
        test_data=(rows[test], labels[test]),
        batch_size=batch_size,
        epochs=epochs,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(chosen, T_max=epochs),
    )
