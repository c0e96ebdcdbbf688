"""CelebA's names and numbers: attributes, files, sizes."""

from __future__ import annotations

from pipeline.data.sources.base import DatasetInfo

CELEBA_ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby",
    "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male",
    "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose",
    "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair",
    "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)  # fmt: skip
HEIGHT = 218  # of an aligned image, pixels
WIDTH = 178
CELEBA_CROP = 148  # the usual centred square, pixels
LAST_TRAIN = 162_770  # the published split goes by the number in an image's name
LAST_VAL = 182_637
LAST_TEST = 202_599

CELEBA_INFO = DatasetInfo(
    name="celeba",
    native_size=(HEIGHT, WIDTH),
    exclusive=(
        ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"),
        ("Straight_Hair", "Wavy_Hair"),
    ),
    showcase=(("Heavy_Makeup", "Male"),),  # figure 5 of arXiv 2511.08946
    swept=(
        "Smiling", "Male", "Eyeglasses", "Blond_Hair", "Young", "Heavy_Makeup", "Bald", "Pale_Skin",
    ),
    contrast=("Male", "Smiling"),
    crop=CELEBA_CROP,
)  # fmt: skip

ATTRIBUTES_FILES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION_FILES = ("list_eval_partition.txt", "list_eval_partition.csv")
IMAGE_FOLDERS = ("img_align_celeba", "img_align_celeba_png")
IMAGE_PLACES = (*IMAGE_FOLDERS, *(f"{name}.zip" for name in IMAGE_FOLDERS))
LAYOUT = (
    "img_align_celeba/ or img_align_celeba.zip, list_attr_celeba.txt (or .csv) "
    "and list_eval_partition.txt (or .csv)"
)
