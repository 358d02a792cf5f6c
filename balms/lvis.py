"Temporary: what was here is in annotation_rules, annotations, instance_data and instance_ap"
from .annotation_rules import *
from .annotations import *
from .instance_data import *
from .instance_ap import *
