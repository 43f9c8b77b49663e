// A kubelet of which there is nothing but port-forward, for pods on the network of their node: what kubectl and istioctl need to
// reach a proxy. It leads to the loopback address of the network that it runs in, and asks nobody who they are.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"strings"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
)

// The protocol that the API server speaks to kubelets.
var protocols = []string{"portforward.k8s.io"}

type loopback struct{}

func (loopback) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	socket, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 5*time.Second)
	if err != nil {
		return err
	}
	defer socket.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(socket, stream)
		sent <- errors.Join(err, socket.(*net.TCPConn).CloseWrite())
	}()
	if _, err := io.Copy(stream, socket); err != nil {
		return err
	}
	stream.Close()
	<-sent
	return nil
}

// Answers /portForward/<namespace>/<pod>.
func handle(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if len(parts) < 3 || parts[0] != "portForward" {
		http.Error(w, "this kubelet can only forward ports", http.StatusNotFound)
		return
	}
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	log.Printf("port-forward to %s/%s", parts[1], parts[2])
	portforward.ServePortForward(w, r, loopback{}, parts[2], "", options, time.Minute, 10*time.Second, protocols)
}

func certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	template := x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), DNSNames: []string{"kubelet"}}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func main() {
	address := flag.String("address", "127.0.0.1:10250", "where to listen")
	flag.Parse()
	own, err := certificate()
	if err != nil {
		log.Fatal(err)
	}
	server := http.Server{
		Addr:              *address,
		Handler:           http.HandlerFunc(handle),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{own}, NextProtos: []string{"http/1.1"}},
		ReadHeaderTimeout: 10 * time.Second,
	}
	log.Fatal(server.ListenAndServeTLS("", ""))
}
