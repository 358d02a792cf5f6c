"Temporary: what `balms.seg_runs` had, from where it is now"
from .detection_recipe import *
from .detection_runs import *
from .detection_recipe import DetectionRecipe as SegRecipe
from .detection_runs import DetectionStudy as SegStudy, detection_table as seg_table, run_detection as run_instance_seg
from .detection_cli import balms_lvis
