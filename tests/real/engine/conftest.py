from tests.support.engine_driver import driver, tiny

__all__ = ["driver", "tiny"]
