-- Who may do what: workspaces, users with their memberships, and keys.

-- A tenant. Its public id is 'ws_' and this number.
CREATE TABLE workspaces (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    name text NOT NULL
);

-- A holder of platform keys. Its public id is 'user_' and this number.
CREATE TABLE users (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    name text NOT NULL
);

CREATE TABLE memberships (
    user_id bigint NOT NULL REFERENCES users (id),
    workspace_id bigint NOT NULL REFERENCES workspaces (id),
    PRIMARY KEY (user_id, workspace_id)
);

-- Keys are never deleted: entries name the key that stored them. The plain key is nowhere; looking a call's key up by its
-- SHA-256 is the one hot query here, and the unique index serves it.
CREATE TABLE api_keys (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workspace_id bigint REFERENCES workspaces (id),
    user_id bigint REFERENCES users (id),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    secret_sha256 bytea NOT NULL UNIQUE CHECK (octet_length(secret_sha256) = 32),
    name text NOT NULL,
    CHECK (num_nonnulls(workspace_id, user_id) = 1)
);
