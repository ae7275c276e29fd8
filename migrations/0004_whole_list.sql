-- What reading, deleting and replaying need beside the entries themselves.

-- Random octets that all servers share. 'page_token' signs the tokens of list pages, so that a token which was tampered with or belongs to
-- another filter or workspace is told from a good one. Two random UUIDs are 244 random bits.
CREATE TABLE secrets (
    name text PRIMARY KEY,
    secret bytea NOT NULL
);
INSERT INTO secrets (name, secret)
VALUES ('page_token', decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex'));

-- The trace of every deletion: who, when, what was asked for, how many. Written in the transaction of each batch.
CREATE TABLE deletions (
    workspace_id bigint NOT NULL,
    id uuid NOT NULL,
    key_id bigint NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    deleted bigint NOT NULL,
    -- 'emails' or 'all'
    mode text NOT NULL,
    -- With 'emails': how many different addresses the caller named.
    named bigint,
    -- With 'all': the filter, each part empty unless it was set.
    filter_type text,
    filter_reason text,
    filter_search text,
    filter_created_from timestamptz,
    filter_created_to timestamptz,
    PRIMARY KEY (workspace_id, id)
);

-- Which import answers a request id. The counts are those of the import's own row, written with its last batch; the causes of refused
-- entries are kept here, encoded as the caller gets them. While the import runs, its server renews the lease; an
-- import whose lease is over has died, and the next caller with the same id runs it again.
CREATE TABLE import_requests (
    workspace_id bigint NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    import_id uuid NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz NOT NULL,
    errors bytea,
    PRIMARY KEY (workspace_id, request_id)
);

-- For clearing out what is older than a request id is remembered.
CREATE INDEX import_requests_started_at ON import_requests (workspace_id, started_at);
