"""Which classes are known: the field's open-set splits.

Neal et al., "Open Set Learning with Counterfactual Images", ECCV 2018, as used by Vaze et al., "Open-Set Recognition:
A Good Closed-Set Classifier is All You Need", ICLR 2022. Indices count the classes in the data set's own order
(TinyImageNet: the sorted list of all 200 wnids). All other classes of the test set are unknown.
"""

MNIST = [
    [2, 4, 5, 9, 8, 3],
    [3, 2, 6, 9, 4, 0],
    [5, 8, 3, 2, 4, 6],
    [3, 7, 8, 4, 0, 5],
    [6, 3, 4, 9, 8, 2],
]

SPLITS: dict[str, list[list[int]]] = {
    "digits": MNIST,  # the same ten digits, so the same lists
    "mnist": MNIST,
    "svhn": [
        [5, 3, 7, 2, 8, 6],
        [3, 8, 7, 6, 2, 5],
        [8, 9, 4, 7, 2, 1],
        [3, 8, 2, 5, 0, 6],
        [4, 9, 2, 7, 1, 0],
    ],
    "cifar10": [
        [0, 6, 4, 9, 1, 7],
        [7, 6, 4, 9, 0, 1],
        [1, 5, 7, 3, 9, 4],
        [8, 6, 1, 9, 0, 7],
        [2, 4, 1, 7, 9, 6],
    ],
    "tinyimagenet": [
        [108, 147, 17, 58, 193, 123, 72, 144, 75, 167, 134, 14, 81, 171, 44, 197, 152, 66, 1, 133],
        [198, 161, 91, 59, 57, 134, 61, 184, 90, 35, 29, 23, 199, 38, 133, 19, 186, 18, 85, 67],
        [177, 0, 119, 26, 78, 80, 191, 46, 134, 92, 31, 152, 27, 60, 114, 50, 51, 133, 162, 93],
        [98, 36, 158, 177, 189, 157, 170, 191, 82, 196, 138, 166, 43, 13, 152, 11, 75, 174, 193, 190],
        [95, 6, 145, 153, 0, 143, 31, 23, 189, 81, 20, 21, 89, 26, 36, 170, 102, 177, 108, 169],
    ],
}
