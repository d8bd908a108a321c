"""Where serving starts: what profiling and warm-up routed is forgotten."""

from types import SimpleNamespace

from vllm_balance.seams.worker import BalancedWorker


def test_what_was_routed_up_to_the_end_of_the_warm_up_is_forgotten():
    done = []

    class StockWorker:
        def compile_or_warm_up_model(self):
            done.append("warm-up")
            return "times"

    class Worker(BalancedWorker, StockWorker):
        worker_balancer = SimpleNamespace(start_serving=lambda: done.append("forgotten"))

    assert Worker().compile_or_warm_up_model() == "times"
    assert done == ["warm-up", "forgotten"]
