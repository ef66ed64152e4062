"""Models as values: capture, coupled groups, surgery, proof, taps."""

from karui.model.edits import Edit as Edit
from karui.model.edits import Note as Note
from karui.model.edits import edit as edit
from karui.model.edits import edit_from_json as edit_from_json
from karui.model.edits import edit_to_json as edit_to_json
from karui.model.origin import Origin as Origin
from karui.model.origin import resolve as resolve
from karui.model.replace import Replace as Replace
from karui.model.replace import build_layer as build_layer
from karui.model.replace import describe_layer as describe_layer
from karui.model.replace import replace_layers as replace_layers
from karui.model.taps import layer_at as layer_at
from karui.model.taps import taps as taps
from karui.model.task import Classification as Classification
from karui.model.task import CustomTask as CustomTask
from karui.model.task import Regression as Regression
from karui.model.task import Task as Task
from karui.model.value import Model as Model
