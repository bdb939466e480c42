"""What travels on the socket: frames and messages. `docs/protocol.md` is the contract."""
