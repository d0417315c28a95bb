// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/namespace"
	"signalbox/internal/rootonly"
)

// readyTimeout bounds the wait for the conditions. The holder of the node lock may be
// busy with another process for a second. That the node is served is known without
// them.
const readyTimeout = 2 * time.Second

// Ready returns nil if a signalbox of this PID namespace, and so of this container,
// holds the node lock: then all Services are in the kernel, and no earlier process
// writes there. Otherwise the error says who holds it. /healthz cannot tell: while two
// processes run on a node, the earlier one answers. dir is the directory of --run-dir.
// conditions are the faults with which the holder serves on.
func Ready(dir string) (conditions []string, err error) { return ready(dir, abstractName) }

func ready(dir, abstract string) (conditions []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	conn, err := dialHolder(ctx, dir, abstract)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, errors.New("not ready: no signalbox serves this node yet")
	}
	if err != nil {
		return nil, fmt.Errorf("not ready: cannot ask which signalbox serves this node: %w", err)
	}
	defer conn.Close()
	holder, err := rootonly.Peer(conn)
	if err != nil {
		return nil, fmt.Errorf("not ready: cannot tell which signalbox serves this node: %w", err)
	}
	if err := ours(holder); err != nil {
		return nil, err
	}
	return askConditions(ctx, conn), nil
}

// dialHolder connects to the holder in the directory, or at the abstract socket if there
// is none in the directory.
func dialHolder(ctx context.Context, dir, abstract string) (*net.UnixConn, error) {
	addresses := []string{abstract}
	if dir != "" {
		id, err := namespace.Current()
		if err != nil {
			return nil, err
		}
		addresses = []string{socketPath(dir, id), abstract}
	}
	var d net.Dialer
	var err error
	for _, address := range addresses {
		var conn net.Conn
		if conn, err = d.DialContext(ctx, "unix", address); err == nil {
			return conn.(*net.UnixConn), nil
		}
	}
	return nil, err
}

// askConditions returns what the signalbox that serves the node answers in time.
func askConditions(ctx context.Context, conn *net.UnixConn) []string {
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if err := send(conn, wordConditions); err != nil {
		return nil
	}
	text, _ := io.ReadAll(conn) // what came before an error is an answer, too
	return slices.Collect(strings.Lines(string(text)))
}

// ours returns nil if a peer is in this PID namespace. The kernel gives 0 for a
// process that has no number there (unix(7), pid_namespaces(7)).
func ours(holder *unix.Ucred) error {
	if err := rootonly.Check(holder); err != nil {
		return fmt.Errorf("not ready: the process that holds the node lock is not signalbox: %w", err)
	}
	if holder.Pid == 0 {
		return errors.New("not ready: a signalbox of another container still serves this node")
	}
	return nil
}
