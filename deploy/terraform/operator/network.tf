# One public subnet: the members come from outside. Nothing but the coordinator's port answers, and only to their networks;
# administrators use Session Manager, which needs no port at all.

resource "aws_vpc" "this" {
  cidr_block           = var.vpc_cidr
  enable_dns_support   = true
  enable_dns_hostnames = true

  tags = { Name = var.name }
}

# The default group of a network lets its members talk to each other; here it lets nobody do anything.
resource "aws_default_security_group" "closed" {
  vpc_id = aws_vpc.this.id
}

resource "aws_subnet" "public" {
  vpc_id                  = aws_vpc.this.id
  availability_zone       = var.availability_zone
  cidr_block              = cidrsubnet(var.vpc_cidr, 4, 0)
  map_public_ip_on_launch = false

  tags = { Name = "${var.name}-public" }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id

  tags = { Name = var.name }
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.this.id

  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.this.id
  }

  tags = { Name = "${var.name}-public" }
}

resource "aws_route_table_association" "public" {
  subnet_id      = aws_subnet.public.id
  route_table_id = aws_route_table.public.id
}

# Images, bundles and backups stay within AWS's network.
resource "aws_vpc_endpoint" "s3" {
  vpc_id            = aws_vpc.this.id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = [aws_route_table.public.id]
}

resource "aws_security_group" "parent" {
  name        = "${var.name}-parent"
  description = "Coordinator of Parley: its port, for the members"
  vpc_id      = aws_vpc.this.id

  tags = { Name = "${var.name}-parent" }
}

resource "aws_vpc_security_group_ingress_rule" "members" {
  for_each = toset(var.members_cidrs)

  security_group_id = aws_security_group.parent.id
  description       = "gRPC over TLS"
  cidr_ipv4         = each.value
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

# Packages of Amazon Linux, Session Manager, S3 and the parties' KMS: all of it HTTPS.
resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.parent.id
  description       = "HTTPS"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_eip" "parent" {
  domain   = "vpc"
  instance = aws_instance.parent.id

  tags       = { Name = var.name }
  depends_on = [aws_internet_gateway.this]
}
