"""PSNR and SSIM by a named protocol.

`medq` is the definition users publish with: 8-bit RGB, data range 255, scikit-image's SSIM with
its default 7 x 7 uniform window, images of another size resampled to the compared size.
"""

from data.scores import PSNR_OF_EQUAL_IMAGES as PSNR_OF_EQUAL_IMAGES
from data.scores import psnr_db as psnr_db
from data.scores import scores as scores
from data.scores import ssim as ssim

PROTOCOL = "medq"
