"""Balance the experts of expert-parallel MoE models served by stock vLLM.

Read it in this order; a module imports only from rows below its own (tests/test_layers.py):

1. `plugin`: the entry point of vLLM's plugins, which imports nothing until it is called
2. `commands`, `endpoint`: what people call
3. `seams`: where vLLM is touched; the worker classes are their top
4. `balancer`, `slot_balancer`: the hub of one batch; `deployment`, `slot_deployment`,
   `initial_placement`, `online`, `worker_balancer`: what is deployed; `simulate`: the same
   decisions with modelled times
5. `config`: settings; `exchange`: how counts reach all ranks
6. `routing`, `placement`, `experts`: policies, and the experts of one rank; `cost`, `fetch_cost`,
   `profiles`, `maps`: curves and files
7. `metrics`, `prometheus`; `recorder`, `traces`, `replay`; `model_shape`, `documents`; and, in no
   server, `measurement`, `own_benchmarks` and the tables of benchmarks
8. `kernels`
9. `types`, `errors`: the vocabulary and the one exception
"""

__version__ = "0.1.0"
