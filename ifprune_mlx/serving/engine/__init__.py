"""The serving engine: many requests on one model, each under its own selection. No HTTP."""
