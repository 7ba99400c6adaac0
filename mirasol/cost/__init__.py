"""What a model costs, by arithmetic over `mirasol.Config`: operations, parameters, memory.

    from mirasol import Config, cost
    cost.model(Config.preset("base"), chunks=16, text_tokens=64).total  # FLOPs of a forward pass
    cost.training(Config.preset("base"), chunks=16, text_tokens=64)  # FLOPs of a training step

`python -m mirasol.cost --table` prints what training the 3B model needs, which stands in docs/scale.md.
"""

from mirasol.cost.fits import longest as longest
from mirasol.cost.fits import stream_bytes as stream_bytes
from mirasol.cost.fits import training_bytes as training_bytes
from mirasol.cost.flops import Cost as Cost
from mirasol.cost.flops import attention as attention
from mirasol.cost.flops import block as block
from mirasol.cost.flops import chunk_pairs as chunk_pairs
from mirasol.cost.flops import combiner as combiner
from mirasol.cost.flops import linear as linear
from mirasol.cost.flops import model as model
from mirasol.cost.flops import summary as summary
from mirasol.cost.flops import training as training
from mirasol.cost.flops import transformer_combiner as transformer_combiner
from mirasol.cost.memory import Memory as Memory
from mirasol.cost.memory import activations as activations
from mirasol.cost.memory import memory as memory
from mirasol.cost.memory import peak as peak
from mirasol.cost.parameters import Parameters as Parameters
from mirasol.cost.parameters import parameters as parameters
from mirasol.cost.streams import StreamState as StreamState
from mirasol.cost.streams import stream as stream
