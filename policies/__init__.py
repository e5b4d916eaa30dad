"""What decides: the contract, the one loop, device facts as data, the closed-form cost model, the policies."""
