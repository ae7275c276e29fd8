-- The hot table. Everything here is paid for on every insert; each line says why it is worth it.
--
-- The key's order is the order of the bytes (COLLATE "C"), so the program sorts a batch exactly as the index does. The type has no
-- column: an address has an '@' and a domain has none. There is no foreign key to workspaces (a third of the insert rate);
-- nothing but the auth layer makes a workspace id, and workspaces are never deleted. Fixed-width columns come first, which saves padding.
CREATE TABLE entries (
    workspace_id bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    added_by bigint NOT NULL,
    address text COLLATE "C" NOT NULL,
    reason text NOT NULL,
    PRIMARY KEY (workspace_id, address)
);

-- For filters by time. A B-tree would cost 8 % of the insert rate; rows arrive in the order of time, so block ranges are enough.
CREATE INDEX entries_created_at ON entries USING brin (created_at);

-- For lists of domains alone, a handful among millions of addresses. Costs the insert of an address one look at the text.
CREATE INDEX entries_domains ON entries (workspace_id, address) WHERE strpos(address, '@') = 0;
