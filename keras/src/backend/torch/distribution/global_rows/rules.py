"""All rules: importing this fills the table."""

from keras.src.backend.torch.distribution.global_rows import differentiation
from keras.src.backend.torch.distribution.global_rows import elementwise
from keras.src.backend.torch.distribution.global_rows import functions
from keras.src.backend.torch.distribution.global_rows import losses
from keras.src.backend.torch.distribution.global_rows import products
from keras.src.backend.torch.distribution.global_rows import questions
from keras.src.backend.torch.distribution.global_rows import reductions
from keras.src.backend.torch.distribution.global_rows import views

MODULES = (
    differentiation,
    elementwise,
    functions,
    losses,
    products,
    questions,
    reductions,
    views,
)
