"Temporary: what `balms.instance_seg` had, from where it is now"
from .detector import *
from .detector import _plain_sigmoid
from .roi_reweighter import *
