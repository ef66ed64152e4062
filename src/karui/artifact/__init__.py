"""Save, load, pack, export and verify."""

from karui.artifact.export import Exported as Exported
from karui.artifact.export import Verification as Verification
from karui.artifact.export import export_onnx as export_onnx
from karui.artifact.load import load as load
from karui.artifact.save import Saved as Saved
from karui.artifact.save import StoredTensor as StoredTensor
from karui.artifact.save import save as save
from karui.artifact.save import stored_bytes as stored_bytes
from karui.artifact.verify import load_deployment as load_deployment
from karui.artifact.verify import verify as verify
