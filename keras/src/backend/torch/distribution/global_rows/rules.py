"""All rules: importing this fills the table."""

from keras.src.backend.torch.distribution.global_rows import elementwise
from keras.src.backend.torch.distribution.global_rows import functions
from keras.src.backend.torch.distribution.global_rows import products
from keras.src.backend.torch.distribution.global_rows import reductions
from keras.src.backend.torch.distribution.global_rows import views

MODULES = (elementwise, functions, products, reductions, views)
